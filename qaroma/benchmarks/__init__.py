"""Public test sets, scored as their papers score them: task by task, with an interval, resumable."""
