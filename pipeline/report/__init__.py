"""What a verification leaves behind and shows: files, a page, a table, a comparison."""
