"""What a run needs, told without running it: the model on virtual ranks, and the memory of a step."""
