"""Foreign APIs in front of the queue: they translate, and have no rules of their own."""
