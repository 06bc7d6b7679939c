"""Pictures that follow each other: read from files, cameras and addresses, grounded, written."""
