"""The report of a study: words, tables, figures and a page that holds them all."""
