"""The paper's comparison at a small scale: continue one checkpoint by next-token training and by ReFINE, over several seeds."""
