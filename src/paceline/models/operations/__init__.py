"""Operations: what the nodes of a network compute by, with their gradients, and how they share streams and sums."""
