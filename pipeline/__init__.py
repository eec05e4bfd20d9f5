"""What runs on the engineer's machine: load or train → quantize → trace → export → compile → verify → bundle."""
