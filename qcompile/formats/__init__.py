"""How bits lie: one file a storage family, one class a format (the table of them is `qcompile.format.FORMATS`)."""
