"""Training and fine-tuning, step by step; `pipeline/train.py` is the stage."""
