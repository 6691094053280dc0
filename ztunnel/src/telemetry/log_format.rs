//! The program's own log, on standard error, in Istio's two forms: `TIME\tLEVEL\tSCOPE\tMESSAGE
//! FIELDS`, or JSON with `level`, `time`, `scope`, `message` and the fields beside them. The level
//! can be changed while the program runs, for all of it or by scope.

use std::{
    fmt::{self, Debug, Write},
    io,
    sync::OnceLock,
    time::SystemTime,
};

use serde_json::{Map, Value};
use tracing::{
    field::{Field, Visit},
    level_filters::LevelFilter,
    Event, Subscriber,
};
use tracing_subscriber::{
    filter::Targets,
    fmt::{
        format::{FormatEvent, FormatFields, Writer},
        FmtContext,
    },
    layer::SubscriberExt,
    registry::LookupSpan,
    reload,
    util::SubscriberInitExt,
    Registry,
};

use super::access_log::{timestamp, LogFormat};

/// What the scopes of the program are called in the log: as Istio's, `ztunnel::…`.
const CRATE: &str = "meshlight_ztunnel";
const SHOWN: &str = "ztunnel";

static LEVELS: OnceLock<reload::Handle<Targets, Registry>> = OnceLock::new();

/// Starts the log; `levels` as [`set_levels`] takes them, anything else means `info`.
pub fn start(format: LogFormat, levels: &str) {
    let targets = parse(levels).unwrap_or_else(|_| Targets::new().with_default(LevelFilter::INFO));
    let (filter, handle) = reload::Layer::new(targets);
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(io::stderr)
        .event_format(Lines(format));
    tracing_subscriber::registry()
        .with(filter)
        .with(lines)
        .init();
    let _ = LEVELS.set(handle);
}

/// The levels in force.
pub fn levels() -> String {
    LEVELS
        .get()
        .and_then(|handle| handle.with_current(ToString::to_string).ok())
        .unwrap_or_default()
        .replace(CRATE, SHOWN)
}

/// Changes the levels: `LEVEL`, or `SCOPE:LEVEL`, or several of them with commas between.
pub fn set_levels(levels: &str) -> Result<(), String> {
    let targets = parse(levels)?;
    let handle = LEVELS.get().ok_or("the log has not started")?;
    handle.reload(targets).map_err(|error| error.to_string())
}

fn parse(levels: &str) -> Result<Targets, String> {
    let mut targets = Targets::new().with_default(LevelFilter::INFO);
    for clause in levels.split(',').map(str::trim) {
        let level = |text: &str| {
            text.parse::<LevelFilter>()
                .ok()
                .filter(|_| !text.chars().all(|c| c.is_ascii_digit()))
                .ok_or_else(|| {
                    format!("{text:?} is no level; off, error, warn, info, debug and trace are")
                })
        };
        // A scope has `::` in it, so its level comes after the last mark.
        match clause.rsplit_once(['=', ':']) {
            None => targets = targets.with_default(level(clause)?),
            Some((scope, of)) => {
                let scope = match scope.strip_prefix(SHOWN) {
                    Some(rest) => format!("{CRATE}{rest}"),
                    None => scope.to_owned(),
                };
                targets = targets.with_target(scope, level(of)?);
            }
        }
    }
    Ok(targets)
}

struct Lines(LogFormat);

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut fields = Fields::default();
        event.record(&mut fields);
        let metadata = event.metadata();
        let level = metadata.level().as_str().to_ascii_lowercase();
        let scope = metadata.target().replacen(CRATE, SHOWN, 1);
        let time = timestamp(SystemTime::now());
        match self.0 {
            LogFormat::Json => {
                let mut line = Map::new();
                line.insert("level".to_owned(), level.into());
                line.insert("time".to_owned(), time.into());
                line.insert("scope".to_owned(), scope.into());
                line.insert("message".to_owned(), fields.message.into());
                line.extend(fields.others);
                let line = serde_json::to_string(&line).map_err(|_| fmt::Error)?;
                writeln!(writer, "{line}")
            }
            LogFormat::Text => {
                write!(writer, "{time}\t{level}\t{scope}\t{}", fields.message)?;
                let mut separator = '\t';
                for (name, value) in &fields.others {
                    write!(writer, "{separator}{name}={value}")?;
                    separator = ' ';
                }
                writeln!(writer)
            }
        }
    }
}

#[derive(Default)]
struct Fields {
    message: String,
    others: Vec<(String, Value)>,
}

impl Fields {
    fn put(&mut self, field: &Field, value: Value) {
        self.others.push((field.name().to_owned(), value));
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        if field.name() == "message" {
            let _ = write!(self.message, "{value:?}");
        } else {
            self.put(field, format!("{value:?}").into());
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            value.clone_into(&mut self.message);
        } else {
            self.put(field, value.into());
        }
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, value.into());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_for_all_or_by_scope() {
        for (levels, enabled) in [
            ("debug", true),
            ("info", false),
            ("ztunnel::proxy:debug", true),
            ("ztunnel::proxy=debug", true),
            ("warn,ztunnel::proxy:debug", true),
            ("debug,ztunnel::proxy:error", false),
        ] {
            let targets = parse(levels).unwrap();
            assert_eq!(
                targets.would_enable("meshlight_ztunnel::proxy::pool", &tracing::Level::DEBUG),
                enabled,
                "{levels}"
            );
        }
        for wrong in ["loud", "", "ztunnel::proxy", "5"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
    }
}
