"""What all reports share: pages, tables, colours and pictures."""
