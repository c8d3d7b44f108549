"""Public test sets, scored by lm-evaluation-harness: its own tasks, and LLM-Adapters' eight as tasks of ours."""
