"""What a run trains on: objectives, of which supervised fine-tuning is the first."""
