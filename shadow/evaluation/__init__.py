"""What is measured of both policies, and what follows? Bars, batches, gates, registration."""
