"""Teaching, calibrating and measuring a text router, offline. Knows no running gateway."""
