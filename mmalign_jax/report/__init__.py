"""What a run shows: metrics, the terminal, the report."""
