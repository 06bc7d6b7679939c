"""HTML pages that a device can make without further libraries."""
