"""What every room stands on: values, errors users can meet, files, randomness."""
