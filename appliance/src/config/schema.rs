//! The JSON Schema of the configuration file, for editors.

use schemars::generate::SchemaSettings;
use serde_json::{Value, json};

use super::Config;

/// The schema (draft 2020-12) with a title, a description and the default of every key.
pub fn schema() -> Value {
    let generator = SchemaSettings::draft2020_12().into_generator();
    let mut schema = generator.into_root_schema_for::<Config>().to_value();
    complete(&mut schema);
    if let Some(root) = schema.as_object_mut() {
        root.insert("title".into(), json!("edged.toml"));
    }
    schema
}

/// Gives each property its name as title, and as default what the last sentence of its description says.
fn complete(schema: &mut Value) {
    match schema {
        Value::Object(object) => {
            if let Some(Value::Object(properties)) = object.get_mut("properties") {
                for (name, property) in properties {
                    if let Value::Object(property) = property {
                        property.insert("title".into(), json!(name));
                        let default = property.get("description").and_then(Value::as_str).and_then(default_of);
                        if let Some(default) = default
                            && property.get("default").is_none_or(Value::is_null)
                        {
                            property.insert("default".into(), default);
                        }
                    }
                }
            }
            object.values_mut().for_each(complete);
        }
        Value::Array(values) => values.iter_mut().for_each(complete),
        _ => {}
    }
}

/// The value after "Default: ", where it is one value and no explanation.
fn default_of(description: &str) -> Option<Value> {
    let (_, text) = description.rsplit_once("Default: ")?;
    let text = text.trim().strip_suffix('.')?;
    if let Ok(value) = serde_json::from_str(text) {
        return Some(value);
    }
    let duration = text.starts_with(|c: char| c.is_ascii_digit()) && humantime::parse_duration(text).is_ok();
    duration.then(|| json!(text))
}
