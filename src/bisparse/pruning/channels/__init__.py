"""Channel permutation: reordering channels so that a pattern keeps more score, without changing the network's function."""
