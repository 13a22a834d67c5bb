-- Nothing to change here: `purge` asks SQLite to look after itself. (PostgreSQL is told how often to vacuum.)
SELECT 1;
