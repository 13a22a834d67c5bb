-- Every row lives in one of 256 buckets; the bucket is the first column of each primary key and unique index, so that
-- these tables can be distributed or hash-partitioned by it as they are. Instants are whole seconds.

CREATE TABLE owners (
    bucket     SMALLINT    NOT NULL,
    id         UUID        NOT NULL,
    key        TEXT        NOT NULL,
    name       TEXT        NOT NULL,
    time_zone  TEXT        NOT NULL,
    locale     TEXT        NOT NULL,
    created_at TIMESTAMPTZ NOT NULL,
    PRIMARY KEY (bucket, id)
);
CREATE UNIQUE INDEX owners_key ON owners (bucket, key);

CREATE TABLE contacts (
    bucket         SMALLINT    NOT NULL,
    id             UUID        NOT NULL,
    address        TEXT        NOT NULL,
    time_zone      TEXT,
    locale         TEXT,
    suppressed_at  TIMESTAMPTZ,
    suppressed_why TEXT,
    created_at     TIMESTAMPTZ NOT NULL,
    PRIMARY KEY (bucket, id)
);
CREATE UNIQUE INDEX contacts_address ON contacts (bucket, address);

-- Who speaks for whom; in the owner's bucket.
CREATE TABLE owner_contacts (
    bucket     SMALLINT NOT NULL,
    owner_id   UUID     NOT NULL,
    contact_id UUID     NOT NULL,
    PRIMARY KEY (bucket, owner_id, contact_id),
    FOREIGN KEY (bucket, owner_id) REFERENCES owners (bucket, id) ON DELETE CASCADE
);
CREATE INDEX owner_contacts_contact ON owner_contacts (contact_id);

CREATE TABLE tokens (
    bucket          SMALLINT    NOT NULL,
    id              UUID        NOT NULL,
    owner_id        UUID        NOT NULL,
    kind            TEXT        NOT NULL CHECK (kind IN ('primary', 'additional')),
    description     TEXT        NOT NULL,
    scopes          TEXT        NOT NULL,
    secret_hash     BYTEA,
    external_id     TEXT,
    hint            TEXT,
    created_at      TIMESTAMPTZ NOT NULL,
    expires_at      TIMESTAMPTZ,
    deadline_set_at TIMESTAMPTZ NOT NULL,
    generation      INTEGER     NOT NULL,
    unplanned       BOOLEAN     NOT NULL,
    last_used_at    TIMESTAMPTZ,
    status          TEXT        NOT NULL CHECK (status IN ('active', 'expired', 'revoked')),
    ended_at        TIMESTAMPTZ,
    replaced_by     UUID,
    PRIMARY KEY (bucket, id),
    FOREIGN KEY (bucket, owner_id) REFERENCES owners (bucket, id),
    -- Years 1970 to 9999: what every part of the program can count with.
    CHECK (created_at BETWEEN TIMESTAMPTZ '1970-01-01 00:00:00+00' AND TIMESTAMPTZ '9999-12-31 23:59:59+00'),
    CHECK (expires_at BETWEEN TIMESTAMPTZ '1970-01-01 00:00:00+00' AND TIMESTAMPTZ '9999-12-31 23:59:59+00'),
    CHECK (deadline_set_at BETWEEN TIMESTAMPTZ '1970-01-01 00:00:00+00' AND TIMESTAMPTZ '9999-12-31 23:59:59+00'),
    CHECK (last_used_at BETWEEN TIMESTAMPTZ '1970-01-01 00:00:00+00' AND TIMESTAMPTZ '9999-12-31 23:59:59+00'),
    CHECK (ended_at BETWEEN TIMESTAMPTZ '1970-01-01 00:00:00+00' AND TIMESTAMPTZ '9999-12-31 23:59:59+00')
);
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
    bucket     SMALLINT    NOT NULL,
    token_id   UUID        NOT NULL,
    generation INTEGER     NOT NULL,
    lead       BIGINT      NOT NULL CHECK (lead >= 0),
    contact_id UUID        NOT NULL,
    deadline   TIMESTAMPTZ NOT NULL,
    state      TEXT        NOT NULL CHECK (state IN
        ('pending', 'sent', 'superseded', 'cancelled', 'unreachable', 'stale', 'failed')),
    reason     TEXT,
    escalation BOOLEAN     NOT NULL,
    message_id UUID,
    created_at TIMESTAMPTZ NOT NULL,
    settled_at TIMESTAMPTZ,
    PRIMARY KEY (bucket, token_id, generation, lead, contact_id)
);
CREATE INDEX reminders_pending ON reminders (bucket, contact_id) WHERE state = 'pending';
CREATE INDEX reminders_deadline ON reminders (deadline);

-- The outbox; in the contact's bucket. No claim before not_before: when it is due, or when the lease on it ends.
CREATE TABLE messages (
    bucket       SMALLINT    NOT NULL,
    id           UUID        NOT NULL,
    contact_id   UUID        NOT NULL,
    state        TEXT        NOT NULL CHECK (state IN
        ('open', 'held', 'sending', 'retry', 'sent', 'failed', 'cancelled')),
    not_before   TIMESTAMPTZ NOT NULL,
    attempts     INTEGER     NOT NULL,
    lease_holder UUID,
    lease_epoch  INTEGER     NOT NULL,
    last_reply   TEXT,
    created_at   TIMESTAMPTZ NOT NULL,
    claimed_at   TIMESTAMPTZ,
    finished_at  TIMESTAMPTZ,
    PRIMARY KEY (bucket, id)
);
-- The digest: at most one message of a contact collects.
CREATE UNIQUE INDEX messages_open ON messages (bucket, contact_id) WHERE state = 'open';
CREATE INDEX messages_queue ON messages (bucket, not_before) WHERE state IN ('open', 'retry', 'sending');
CREATE INDEX messages_finished ON messages (finished_at) WHERE finished_at IS NOT NULL;

-- Each job's lease and last run; in bucket 0.
CREATE TABLE jobs (
    bucket      SMALLINT    NOT NULL,
    name        TEXT        NOT NULL,
    holder      UUID        NOT NULL,
    epoch       BIGINT      NOT NULL,
    lease_until TIMESTAMPTZ NOT NULL,
    started_at  TIMESTAMPTZ NOT NULL,
    finished_at TIMESTAMPTZ,
    error       TEXT,
    report      TEXT,
    PRIMARY KEY (bucket, name)
);

-- Up to which (instant, token) each lead has been dealt with; in bucket 0.
CREATE TABLE watermarks (
    bucket   SMALLINT    NOT NULL,
    lead     BIGINT      NOT NULL,
    instant  TIMESTAMPTZ NOT NULL,
    token_id UUID        NOT NULL,
    PRIMARY KEY (bucket, lead)
);
