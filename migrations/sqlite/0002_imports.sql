-- Where an imported token's list came from, and which run of the import saw it last.
ALTER TABLE tokens ADD COLUMN source TEXT;
ALTER TABLE tokens ADD COLUMN import_run BLOB;
