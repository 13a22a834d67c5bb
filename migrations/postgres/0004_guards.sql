-- What a message is for: a contact's reminders, the fallback's digest of what others could not be told, or an alert. Each
-- kind collects in a message of its own.
ALTER TABLE messages ADD COLUMN kind TEXT NOT NULL DEFAULT 'reminders'
    CHECK (kind IN ('reminders', 'escalations', 'held', 'held_urgent', 'expiry'));
UPDATE messages SET kind = 'escalations'
WHERE state = 'open' AND EXISTS (
    SELECT 1 FROM reminders r
    WHERE r.bucket = messages.bucket AND r.contact_id = messages.contact_id AND r.state = 'pending'
      AND r.message_id IS NULL AND r.escalation
);
DROP INDEX messages_open;
CREATE UNIQUE INDEX messages_open ON messages (bucket, contact_id, kind) WHERE state = 'open';
-- What a guard keeps back; not_before is then the first deadline that the message speaks of.
CREATE UNIQUE INDEX messages_held ON messages (bucket, contact_id) WHERE state = 'held';
CREATE INDEX messages_held_deadline ON messages (not_before) WHERE state = 'held';
-- When the fallback was last sent a digest, and last alerted of something.
CREATE INDEX messages_to_fallback ON messages (bucket, contact_id, kind, created_at) WHERE kind <> 'reminders';

-- What the guards count, by the minute: messages that each job opened, and tokens that expired; in bucket 0.
CREATE TABLE guard_counts (
    bucket SMALLINT    NOT NULL,
    name   TEXT        NOT NULL,
    minute TIMESTAMPTZ NOT NULL,
    amount BIGINT      NOT NULL,
    PRIMARY KEY (bucket, minute, name)
);
