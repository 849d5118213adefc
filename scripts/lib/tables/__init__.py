"""What `scripts/reproduce.py` is made of: the table file, the plan of runs, their launch, the results."""
