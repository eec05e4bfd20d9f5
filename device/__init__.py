"""What is shipped to the device: standard library, NumPy and Pillow only."""

from device import user

user.settle()  # before any runtime is imported
