"""A day with a GPU: what is prepared at home, and what runs on the machine that has one."""
