"""What each command does: the places where rooms are put together."""
