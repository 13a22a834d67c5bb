-- How often nobody knew whether a message had been delivered, and how often who had claimed it never said.
ALTER TABLE messages ADD COLUMN unknown_outcomes INTEGER NOT NULL DEFAULT 0;
ALTER TABLE messages ADD COLUMN lost_claims INTEGER NOT NULL DEFAULT 0;
