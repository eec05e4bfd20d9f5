"""Images and labels as people have them: one file per format in `formats/`, and what is done with all alike."""
