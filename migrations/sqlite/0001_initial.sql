-- The same tables, names and rules as in PostgreSQL, where the buckets earn their keep. Instants are whole seconds since
-- 1970, ids are the 16 bytes of a UUID, truth values are 0 and 1.

CREATE TABLE owners (
    bucket     INTEGER NOT NULL,
    id         BLOB    NOT NULL,
    key        TEXT    NOT NULL,
    name       TEXT    NOT NULL,
    time_zone  TEXT    NOT NULL,
    locale     TEXT    NOT NULL,
    created_at INTEGER NOT NULL,
    PRIMARY KEY (bucket, id)
) STRICT, WITHOUT ROWID;
CREATE UNIQUE INDEX owners_key ON owners (bucket, key);

CREATE TABLE contacts (
    bucket     INTEGER NOT NULL,
    id         BLOB    NOT NULL,
    address    TEXT    NOT NULL,
    time_zone      TEXT,
    locale         TEXT,
    suppressed_at  INTEGER,
    suppressed_why TEXT,
    created_at INTEGER NOT NULL,
    PRIMARY KEY (bucket, id)
) STRICT, WITHOUT ROWID;
CREATE UNIQUE INDEX contacts_address ON contacts (bucket, address);

-- Who speaks for whom; in the owner's bucket.
CREATE TABLE owner_contacts (
    bucket     INTEGER NOT NULL,
    owner_id   BLOB    NOT NULL,
    contact_id BLOB    NOT NULL,
    PRIMARY KEY (bucket, owner_id, contact_id),
    FOREIGN KEY (bucket, owner_id) REFERENCES owners (bucket, id) ON DELETE CASCADE
) STRICT, WITHOUT ROWID;
CREATE INDEX owner_contacts_contact ON owner_contacts (contact_id);

CREATE TABLE tokens (
    bucket          INTEGER NOT NULL,
    id              BLOB    NOT NULL,
    owner_id        BLOB    NOT NULL,
    kind            TEXT    NOT NULL CHECK (kind IN ('primary', 'additional')),
    description     TEXT    NOT NULL,
    scopes          TEXT    NOT NULL,
    secret_hash     BLOB,
    external_id     TEXT,
    hint            TEXT,
    created_at      INTEGER NOT NULL,
    expires_at      INTEGER,
    deadline_set_at INTEGER NOT NULL,
    generation      INTEGER NOT NULL,
    unplanned       INTEGER NOT NULL,
    last_used_at    INTEGER,
    status          TEXT    NOT NULL CHECK (status IN ('active', 'expired', 'revoked')),
    ended_at        INTEGER,
    replaced_by     BLOB,
    PRIMARY KEY (bucket, id),
    FOREIGN KEY (bucket, owner_id) REFERENCES owners (bucket, id),
    -- Years 1970 to 9999: what every part of the program can count with.
    CHECK (created_at BETWEEN 0 AND 253402300799),
    CHECK (expires_at BETWEEN 0 AND 253402300799),
    CHECK (deadline_set_at BETWEEN 0 AND 253402300799),
    CHECK (last_used_at BETWEEN 0 AND 253402300799),
    CHECK (ended_at BETWEEN 0 AND 253402300799)
) STRICT, WITHOUT ROWID;
CREATE UNIQUE INDEX tokens_secret ON tokens (bucket, secret_hash) WHERE secret_hash IS NOT NULL;
CREATE UNIQUE INDEX tokens_primary ON tokens (bucket, owner_id) WHERE kind = 'primary' AND replaced_by IS NULL;
CREATE UNIQUE INDEX tokens_external ON tokens (bucket, owner_id, external_id) WHERE external_id IS NOT NULL;
CREATE INDEX tokens_owner ON tokens (bucket, owner_id);
-- What expire and remind walk along.
CREATE INDEX tokens_deadline ON tokens (expires_at, id) WHERE status = 'active' AND expires_at IS NOT NULL;
CREATE INDEX tokens_unplanned ON tokens (expires_at, id) WHERE unplanned AND status = 'active';
-- Old tokens to purge at one end, tokens that a wrong clock ended too early at the other.
CREATE INDEX tokens_ended ON tokens (ended_at) WHERE ended_at IS NOT NULL;

-- The ledger; in the contact's bucket, or in the token's where there is no contact (the nil id).
CREATE TABLE reminders (
    bucket     INTEGER NOT NULL,
    token_id   BLOB    NOT NULL,
    generation INTEGER NOT NULL,
    lead       INTEGER NOT NULL CHECK (lead >= 0),
    contact_id BLOB    NOT NULL,
    deadline   INTEGER NOT NULL,
    state      TEXT    NOT NULL CHECK (state IN
        ('pending', 'sent', 'superseded', 'cancelled', 'unreachable', 'stale', 'failed')),
    reason     TEXT,
    escalation INTEGER NOT NULL,
    message_id BLOB,
    created_at INTEGER NOT NULL,
    settled_at INTEGER,
    PRIMARY KEY (bucket, token_id, generation, lead, contact_id)
) STRICT, WITHOUT ROWID;
CREATE INDEX reminders_pending ON reminders (bucket, contact_id) WHERE state = 'pending';
CREATE INDEX reminders_deadline ON reminders (deadline);

-- The outbox; in the contact's bucket. No claim before not_before: when it is due, or when the lease on it ends.
CREATE TABLE messages (
    bucket      INTEGER NOT NULL,
    id          BLOB    NOT NULL,
    contact_id  BLOB    NOT NULL,
    state       TEXT    NOT NULL CHECK (state IN
        ('open', 'held', 'sending', 'retry', 'sent', 'failed', 'cancelled')),
    not_before  INTEGER NOT NULL,
    attempts    INTEGER NOT NULL,
    lease_holder BLOB,
    lease_epoch INTEGER NOT NULL,
    last_reply   TEXT,
    created_at  INTEGER NOT NULL,
    claimed_at   INTEGER,
    finished_at  INTEGER,
    PRIMARY KEY (bucket, id)
) STRICT, WITHOUT ROWID;
-- The digest: at most one message of a contact collects.
CREATE UNIQUE INDEX messages_open ON messages (bucket, contact_id) WHERE state = 'open';
CREATE INDEX messages_queue ON messages (bucket, not_before) WHERE state IN ('open', 'retry', 'sending');
CREATE INDEX messages_finished ON messages (finished_at) WHERE finished_at IS NOT NULL;

-- Each job's lease and last run; in bucket 0.
CREATE TABLE jobs (
    bucket      INTEGER NOT NULL,
    name        TEXT    NOT NULL,
    holder      BLOB    NOT NULL,
    epoch       INTEGER NOT NULL,
    lease_until INTEGER NOT NULL,
    started_at  INTEGER NOT NULL,
    finished_at INTEGER,
    error       TEXT,
    report      TEXT,
    PRIMARY KEY (bucket, name)
) STRICT, WITHOUT ROWID;

-- Up to which (instant, token) each lead has been dealt with; in bucket 0.
CREATE TABLE watermarks (
    bucket   INTEGER NOT NULL,
    lead     INTEGER NOT NULL,
    instant  INTEGER NOT NULL,
    token_id BLOB    NOT NULL,
    PRIMARY KEY (bucket, lead)
) STRICT, WITHOUT ROWID;
