"""Which answers do series of numbers give? Pure functions on arrays that know no policy."""
