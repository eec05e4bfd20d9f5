"""What is shipped to the device: standard library, NumPy and Pillow only."""

from bitferry.device import user

user.settle()  # before any runtime is imported
