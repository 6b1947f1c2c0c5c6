"""How hyper-parameters are found: a search over runs, each of them an ordinary training."""
