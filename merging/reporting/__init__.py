"""Tables, figures and pages from plain data. Nothing here knows what a study is."""
