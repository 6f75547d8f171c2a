"""What experiments share: tasks, a journal of scores, runs in processes, tables."""
