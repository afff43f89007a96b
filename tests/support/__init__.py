"""What several test files use: models and files to test with, exact results to compare with, ways to fail."""
