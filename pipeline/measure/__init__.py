"""What a verification measures: answers, speed, what ran, and where accuracy goes."""
