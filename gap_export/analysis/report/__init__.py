"""The report of a sweep: tables, plots, pictures and the page that holds them."""
