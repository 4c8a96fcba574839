"""quern: quantised LLM checkpoint in, device bundle out. Start at `compiler/pipeline.py`."""
