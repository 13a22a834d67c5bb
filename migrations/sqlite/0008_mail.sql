-- Whether contacts may have been told of a deadline that no longer holds: the token was replaced or revoked, or its deadline moved.
ALTER TABLE tokens ADD COLUMN uncorrected INTEGER NOT NULL DEFAULT 0;
CREATE INDEX tokens_uncorrected ON tokens (id) WHERE uncorrected;
