"""The steps from a float graph to a good int8 one; `steps.py` is their order, docs/quantization.md what each brings."""
