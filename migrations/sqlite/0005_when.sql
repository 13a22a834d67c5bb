-- Who is told of a token besides those who speak for its owner; in the token's bucket.
CREATE TABLE token_contacts (
    bucket     INTEGER NOT NULL,
    token_id   BLOB    NOT NULL,
    contact_id BLOB    NOT NULL,
    PRIMARY KEY (bucket, token_id, contact_id),
    FOREIGN KEY (bucket, token_id) REFERENCES tokens (bucket, id) ON DELETE CASCADE
) STRICT, WITHOUT ROWID;

-- When a contact was last sent reminders; kept only where there is to be some time between two mails.
ALTER TABLE contacts ADD COLUMN mailed_at INTEGER CHECK (mailed_at BETWEEN 0 AND 253402300799);

-- By which policies reminders were last planned: a digest of their text. NULL: by one for all tokens.
ALTER TABLE jobs ADD COLUMN policies TEXT;

-- The deadline that a token had before somebody else than its owner moved it, as long as it has that one; the end of the year
-- 9999 where it had none.
ALTER TABLE tokens ADD COLUMN moved_from INTEGER CHECK (moved_from BETWEEN 0 AND 253402300799);
