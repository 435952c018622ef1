"""The shell: Redis, clock, signals, processes."""
