"""What a trained model prefers; floor 8."""
