"""Running a decision: the sandbox that generated code is judged in."""
