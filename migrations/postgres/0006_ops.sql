-- Rows of these tables are rewritten all the time. Autovacuum comes by when one row in a hundred is dead: with its default, one
-- in five, the left edge of an index holds a million dead entries before. Where the tables are partitioned, each partition is
-- told, as the whole cannot be.
DO $$
DECLARE
    part regclass;
BEGIN
    FOR part IN
        SELECT c.oid::regclass
        FROM pg_class c
        WHERE c.relkind = 'r'
          AND (c.oid IN ('tokens'::regclass, 'reminders'::regclass, 'messages'::regclass)
               OR c.oid IN (SELECT relid FROM pg_partition_tree('tokens'))
               OR c.oid IN (SELECT relid FROM pg_partition_tree('reminders'))
               OR c.oid IN (SELECT relid FROM pg_partition_tree('messages')))
    LOOP
        EXECUTE FORMAT(
            'ALTER TABLE %s SET (autovacuum_vacuum_scale_factor = 0.01, autovacuum_analyze_scale_factor = 0.02)', part
        );
    END LOOP;
END
$$;
