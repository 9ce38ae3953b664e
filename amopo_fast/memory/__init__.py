"""What a run will take, before anything is loaded; floor 6."""
