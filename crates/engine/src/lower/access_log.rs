//! Access logs.

use std::sync::Arc;

use envoy_types::pb::envoy::config::accesslog::v3 as pb;
use envoy_types::pb::envoy::config::core::v3 as core;
use envoy_types::pb::envoy::extensions::access_loggers::file::v3 as file;
use envoy_types::pb::envoy::extensions::access_loggers::filters::cel::v3 as cel;
use envoy_types::pb::envoy::extensions::access_loggers::stream::v3 as stream;
use envoy_types::pb::google::protobuf::Any;
use envoy_types::pb::google::protobuf::{Struct, value::Kind};

use super::common::{json, nothing_left};
use crate::access_log::{AccessLog, Comparison, DEFAULT_TEXT, Format, JsonFormat, JsonValue, LogFilter, Template};
use crate::matcher::HeaderMatcher;
use crate::unsupported::{Unsupported, Within, each, type_name, unpack};

pub(super) fn lower(list: &[pb::AccessLog]) -> Result<Vec<Arc<AccessLog>>, Unsupported> {
    each(list, "", |log| one(log).map(Arc::new))
}

fn one(proto: &pb::AccessLog) -> Result<AccessLog, Unsupported> {
    let filter = proto.filter.as_ref().map(filter).transpose().within("filter")?;
    let Some(pb::access_log::ConfigType::TypedConfig(any)) = &proto.config_type else {
        return Err(Unsupported::missing("typed_config"));
    };
    let (path, format) = sink(any).within("typed_config")?;
    Ok(AccessLog { path, format, filter })
}

fn sink(any: &Any) -> Result<(Box<str>, Format), Unsupported> {
    match type_name(&any.type_url) {
        "envoy.extensions.access_loggers.file.v3.FileAccessLog" => {
            use file::file_access_log::AccessLogFormat;
            let config: file::FileAccessLog = unpack(any, "")?;
            if config.path.is_empty() {
                return Err(Unsupported::missing("path"));
            }
            #[expect(deprecated, reason = "older spellings of the same formats")]
            let format = match config.access_log_format {
                None => Format::Text(Template::compile(DEFAULT_TEXT)?),
                Some(AccessLogFormat::Format(text)) => Format::Text(Template::compile(&text).within("format")?),
                Some(AccessLogFormat::JsonFormat(fields) | AccessLogFormat::TypedJsonFormat(fields)) => {
                    Format::Json(json_format(&fields, false)?)
                }
                Some(AccessLogFormat::LogFormat(format)) => log_format(format).within("log_format")?,
            };
            Ok((config.path.into(), format))
        }
        "envoy.extensions.access_loggers.stream.v3.StdoutAccessLog" => {
            use stream::stdout_access_log::AccessLogFormat;
            let config: stream::StdoutAccessLog = unpack(any, "")?;
            Ok((
                "/dev/stdout".into(),
                match config.access_log_format {
                    None => Format::Text(Template::compile(DEFAULT_TEXT)?),
                    Some(AccessLogFormat::LogFormat(format)) => log_format(format).within("log_format")?,
                },
            ))
        }
        "envoy.extensions.access_loggers.stream.v3.StderrAccessLog" => {
            use stream::stderr_access_log::AccessLogFormat;
            let config: stream::StderrAccessLog = unpack(any, "")?;
            Ok((
                "/dev/stderr".into(),
                match config.access_log_format {
                    None => Format::Text(Template::compile(DEFAULT_TEXT)?),
                    Some(AccessLogFormat::LogFormat(format)) => log_format(format).within("log_format")?,
                },
            ))
        }
        other => Err(Unsupported::new("", format!("{other} is not supported"))),
    }
}

/// Extensions whose operators Envoy knows without them, as we do, or refuses them where they stand, as we do.
const FORMATTERS: [&str; 3] = [
    "envoy.extensions.formatter.cel.v3.Cel",
    "envoy.extensions.formatter.metadata.v3.Metadata",
    "envoy.extensions.formatter.req_without_query.v3.ReqWithoutQuery",
];

fn log_format(mut proto: core::SubstitutionFormatString) -> Result<Format, Unsupported> {
    use core::substitution_format_string::Format as Kind;
    let omit_empty = std::mem::take(&mut proto.omit_empty_values);
    #[expect(deprecated, reason = "the older spelling of a text")]
    let format = match proto.format.take() {
        Some(Kind::TextFormat(text)) => Format::Text(Template::compile(&text).within("text_format")?),
        Some(Kind::TextFormatSource(source)) => match source.specifier {
            Some(core::data_source::Specifier::InlineString(text)) => {
                Format::Text(Template::compile(&text).within("text_format_source")?)
            }
            Some(core::data_source::Specifier::InlineBytes(bytes)) => {
                Format::Text(Template::compile(&String::from_utf8_lossy(&bytes)).within("text_format_source")?)
            }
            _ => return Err(Unsupported::not_built("text_format_source")),
        },
        Some(Kind::JsonFormat(fields)) => Format::Json(json_format(&fields, omit_empty)?),
        None => return Err(Unsupported::missing("format")),
    };
    // Members are always sorted.
    proto.json_format_options = None;
    for (index, formatter) in std::mem::take(&mut proto.formatters).into_iter().enumerate() {
        let kind = formatter.typed_config.as_ref().map_or("", |any| type_name(&any.type_url));
        if !FORMATTERS.contains(&kind) {
            return Err(Unsupported::new(format!("formatters[{index}]"), format!("{kind:?} is not supported")));
        }
    }
    // It is for answers; a log has no type.
    proto.content_type.clear();
    nothing_left(&proto)?;
    Ok(format)
}

fn json_format(fields: &Struct, omit_empty: bool) -> Result<JsonFormat, Unsupported> {
    Ok(JsonFormat { members: members(fields).within("json_format")?, omit_empty })
}

fn members(fields: &Struct) -> Result<Vec<(Box<str>, JsonValue)>, Unsupported> {
    let mut all = Vec::with_capacity(fields.fields.len());
    let mut names: Vec<_> = fields.fields.iter().collect();
    names.sort_by_key(|(name, _)| *name);
    for (name, value) in names {
        let value = match &value.kind {
            Some(Kind::StringValue(text)) => JsonValue::Template(Template::compile(text).within(name)?),
            Some(Kind::StructValue(inner)) => JsonValue::Object(members(inner).within(name)?),
            _ => JsonValue::Fixed(json(value)),
        };
        all.push((name.as_str().into(), value));
    }
    Ok(all)
}

fn filter(proto: &pb::AccessLogFilter) -> Result<LogFilter, Unsupported> {
    use pb::access_log_filter::FilterSpecifier as Kind;
    Ok(match proto.filter_specifier.as_ref().ok_or_else(|| Unsupported::missing("filter_specifier"))? {
        Kind::StatusCodeFilter(filter) => LogFilter::Status(comparison(filter.comparison.as_ref())?),
        Kind::DurationFilter(filter) => LogFilter::Duration(comparison(filter.comparison.as_ref())?),
        Kind::NotHealthCheckFilter(_) => LogFilter::Always,
        Kind::ResponseFlagFilter(filter) => {
            LogFilter::Flags(filter.flags.iter().map(|flag| flag.as_str().into()).collect())
        }
        Kind::HeaderFilter(filter) => {
            let header = filter.header.as_ref().ok_or_else(|| Unsupported::missing("header"))?;
            LogFilter::Header(HeaderMatcher::lower(header).within("header")?)
        }
        Kind::AndFilter(filters) => LogFilter::And(each(&filters.filters, "and_filter.filters", filter)?),
        Kind::OrFilter(filters) => LogFilter::Or(each(&filters.filters, "or_filter.filters", filter)?),
        Kind::ExtensionFilter(extension) => {
            let Some(pb::extension_filter::ConfigType::TypedConfig(any)) = &extension.config_type else {
                return Err(Unsupported::missing("extension_filter.typed_config"));
            };
            let expression: cel::ExpressionFilter = unpack(any, "extension_filter.typed_config")?;
            LogFilter::Expression(crate::cel::Expression::compile(&expression.expression)?)
        }
        _ => return Err(Unsupported::not_built("filter_specifier")),
    })
}

fn comparison(proto: Option<&pb::ComparisonFilter>) -> Result<Comparison, Unsupported> {
    use pb::comparison_filter::Op;
    let proto = proto.ok_or_else(|| Unsupported::missing("comparison"))?;
    let value = proto.value.as_ref().ok_or_else(|| Unsupported::missing("comparison.value"))?;
    let to = u64::from(value.default_value);
    match Op::try_from(proto.op) {
        Ok(Op::Eq) => Ok(Comparison::Equal(to)),
        Ok(Op::Ge) => Ok(Comparison::AtLeast(to)),
        Ok(Op::Le) => Ok(Comparison::AtMost(to)),
        Ok(Op::Ne) => Ok(Comparison::NotEqual(to)),
        Err(_) => Err(Unsupported::new("comparison.op", "is not known")),
    }
}
