"""What is shipped to the device: standard library, NumPy and Pillow only."""
