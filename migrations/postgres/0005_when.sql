-- Who is told of a token besides those who speak for its owner; in the token's bucket.
CREATE TABLE token_contacts (
    bucket     SMALLINT NOT NULL,
    token_id   UUID     NOT NULL,
    contact_id UUID     NOT NULL,
    PRIMARY KEY (bucket, token_id, contact_id),
    FOREIGN KEY (bucket, token_id) REFERENCES tokens (bucket, id) ON DELETE CASCADE
);

-- When a contact was last sent reminders; kept only where there is to be some time between two mails.
ALTER TABLE contacts ADD COLUMN mailed_at TIMESTAMPTZ;
ALTER TABLE contacts ADD
    CHECK (mailed_at BETWEEN TIMESTAMPTZ '1970-01-01 00:00:00+00' AND TIMESTAMPTZ '9999-12-31 23:59:59+00');

-- By which policies reminders were last planned: a digest of their text. NULL: by one for all tokens.
ALTER TABLE jobs ADD COLUMN policies TEXT;

-- The deadline that a token had before somebody else than its owner moved it, as long as it has that one; the end of the year
-- 9999 where it had none.
ALTER TABLE tokens ADD COLUMN moved_from TIMESTAMPTZ;
ALTER TABLE tokens ADD
    CHECK (moved_from BETWEEN TIMESTAMPTZ '1970-01-01 00:00:00+00' AND TIMESTAMPTZ '9999-12-31 23:59:59+00');
