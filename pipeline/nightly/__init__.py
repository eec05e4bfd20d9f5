"""Every recipe on every target in every precision, every night: the matrix, its history and what changed."""
