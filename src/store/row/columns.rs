//! What makes a struct out of a row: a column for each field, by its name.

/// Defines a struct that is read from a row of either back end. A first field behind `..` is a row itself, and read from the
/// same columns.
///
/// sqlx has a derive macro for this. It comes with a second sqlx, SQLite included, for the compiler's own use: an eighth of
/// a whole build.
macro_rules! row {
    (
        $(#[$meta:meta])*
        $vis:vis struct $name:ident {
            $(.. $inner_vis:vis $inner:ident: $inner_type:ty,)?
            $($(#[$column_meta:meta])* $column_vis:vis $column:ident: $type:ty,)*
        }
    ) => {
        $(#[$meta])*
        $vis struct $name {
            $($inner_vis $inner: $inner_type,)?
            $($(#[$column_meta])* $column_vis $column: $type,)*
        }

        impl<'r, R: sqlx::Row> sqlx::FromRow<'r, R> for $name
        where
            &'static str: sqlx::ColumnIndex<R>,
            $($inner_type: sqlx::FromRow<'r, R>,)?
            $($type: sqlx::Decode<'r, R::Database> + sqlx::Type<R::Database>,)*
        {
            fn from_row(row: &'r R) -> sqlx::Result<Self> {
                Ok(Self {
                    $($inner: sqlx::FromRow::from_row(row)?,)?
                    $($column: row.try_get(stringify!($column))?,)*
                })
            }
        }
    };
}
