"""What each command shows at its end: a (renderable, document) pair, for people and for --json."""
